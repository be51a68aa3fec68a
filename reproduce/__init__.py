"""Tests of claims at the scale of a laptop: the papers' (`make reproduce`), and ours on distillation.

plan            the experiments, from configs/reproduce
folder          paths inside the folder of a reproduction
materials       tars by style, tokenizer, configs of the evaluation sets
teachers        teachers and their caches; from packages, squeezenet, saliency_vit, pretraining
run_teachers    finished runs that teach others: caches of their images and captions
pool            tasks side by side, one core each
experiment      one run: trained, evaluated, recorded
budget          estimate of the time of a plan, from short measured runs
scores          scores of finished experiments; learning rates and shares chosen by validation
claims          claims as measured differences, with verdicts
fit_regression  regression of differences on how well the teacher fits the data
report          Markdown, HTML and plots
"""
