"""Rounds of on-policy data: sampled, scored, paired, recorded, and stored."""
