"""HTTP: an OpenAI-compatible API and a chat page, on the same session as the terminal."""
