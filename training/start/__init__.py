"""What a stage starts from: the folder, the model, its teacher, smoothing."""
