"""What a model answers by transformers or ONNX Runtime: classes, embeddings, text. For the engine `Transformers`."""
