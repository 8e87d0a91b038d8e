"""What a model answers by transformers or ONNX Runtime: classes, embeddings, text. Used by `engines.transformers`."""
