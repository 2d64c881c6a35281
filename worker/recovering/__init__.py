"""What quantizing took from a model, won back by small factors beside its layers: a LoRA adapter for PEFT."""
