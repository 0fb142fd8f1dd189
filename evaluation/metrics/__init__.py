"""Metrics of one interface: on pixels, by the embedded model's judge, by networks whose weights the user has."""
