"""The demo: a simulated catalogue whose law is known, so that the best possible recommendations are known too.

simulate   the catalogue, the law of the next item, simulated users
train      the command that makes the shipped models in `models/`, each by its recipe in `fastdiff.train`
__main__   `python -m fastdiff.demo`
"""
