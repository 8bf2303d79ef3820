"""Students: what they can be trained on, their training, their labels and their results."""
