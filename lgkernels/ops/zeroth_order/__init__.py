"""Zeroth-order optimisation: weights perturbed and updated by noise that is a formula."""
