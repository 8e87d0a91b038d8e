"""What a model folder answers through transformers or ONNX Runtime: classes, embeddings, text. The engine `Transformers`."""
