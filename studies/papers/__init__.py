"""The claims of three papers, tested on SmolLM2-135M: `protocol.md` says what and how."""
