"""The demo: a simulated catalogue whose law is known, so that the best possible recommendations are known too.

simulate   the catalogue, the law of the next item, simulated users
network    TA-Rec as a trainable module, and its losses
train      the script that made the shipped model in `model/`
__main__   `python -m fastdiff.demo`
"""
