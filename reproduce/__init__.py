"""Whether the papers' claims hold at the scale of a laptop: `make reproduce` runs it, docs/RESULTS.md tells.

plan          the experiments as data, from configs/reproduce
folder        where everything of a reproduction lies
materials     splits, tokenizer, descriptions of the evaluation sets
teachers      packages · squeezenet · saliency_vit · pretraining; their caches, and how well they fit the data
pool          work side by side, one core each
experiment    one run: trained, evaluated, recorded
sweep         one learning rate a method, by validation
budget        what all of it will take, from short measured runs
scores        what the records say of an experiment: items, units, seeds
claims        each claim as measured differences, and the verdict on it
slope         how a difference goes with how well the teacher fits the data
report        Markdown, HTML and plots
"""
