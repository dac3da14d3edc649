"""The user's problem: a trained model, its loss and frozen examples."""
