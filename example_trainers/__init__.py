"""Runnable recipes: what a user's own training code would look like."""
