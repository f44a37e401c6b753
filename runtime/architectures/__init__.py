"""One file for each architecture: the operations of a decoder, listed from its hyper-parameters and tensors."""
