"""Computes routers: prompts -> states -> router rows."""
