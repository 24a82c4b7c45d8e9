"""Prompts -> states -> router rows."""
