"""Conversations, tokens, packing and shards: what both the offline stage and training share. No torch here."""
