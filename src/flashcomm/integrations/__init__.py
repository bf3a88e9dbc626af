"""Hooks into the frameworks that run models. Each is imported on demand; none is needed to use the collectives."""
