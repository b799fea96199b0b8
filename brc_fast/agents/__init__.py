"""Agents: what is learned, and how."""
