"""The networks of a base in torch: a reference for comparisons, and a back end of the device runtime."""
