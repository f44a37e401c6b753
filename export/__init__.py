"""From a checkpoint to a file that runs anywhere: GGUF, fp16 bin, ONNX. Knows no executor and needs no PyTorch."""
