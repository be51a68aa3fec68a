"""Whether the papers' claims hold at the scale of a laptop: `make reproduce` runs it, docs/RESULTS.md tells.

plan          the experiments as data, from configs/reproduce
materials     splits, tokenizer, descriptions of the evaluation sets
teachers      packages · squeezenet · saliency_vit · fashion · pretraining; and their caches
experiment    one run: trained, evaluated, recorded
sweep         one learning rate a method, by validation
budget        what all of it will take, from short measured runs
scores        what the records say of an experiment: items, units, seeds
claims        each claim as measured differences, and the verdict on it
report        Markdown, HTML and plots
"""
