"""The trainers of ASUKA's networks, in the order in which they run: the prior's auto-encoder, its alignment with a
base, and the decoder. `training.train_asuka` is the way in.
"""
