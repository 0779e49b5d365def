"""What lies on disk: records, prompts, dataset folders, manifests and journals."""
