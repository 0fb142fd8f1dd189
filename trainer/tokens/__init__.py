"""The trainer of a token adapter: what a base learns once, on many objects, to draw a subject from one picture.

`training.train_tokens` is the way in.
"""
