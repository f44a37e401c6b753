"""The recipe of the model that comes with the package: its conversations, its training, what it is measured against."""
