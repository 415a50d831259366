"""This library inside others' models."""
