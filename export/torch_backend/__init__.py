"""A base's networks in torch: the oracle, and a back end of the device runtime."""
