"""Prompts: their sources, their order, and chats rendered by a template."""
