"""Training recipes, one file per paper, in plain PyTorch; inference never imports this package.

recipe      what a recipe is: settings, stages, losses, and the model that it trains
data        sequences split into what is trained on, validated on and tested on; what is wrong with them
layers      the transformer of sasrec and adrec, on histories without padding
trainer     the loop that runs any recipe: validation, early stopping, checkpoints that survive a kill
sasrec, adrec, dreamrec, tarec, cddrec, dimerec
"""
