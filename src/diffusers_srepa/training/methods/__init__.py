"""The methods that can be trained, one module each."""
