"""An OpenAI-compatible server: a process steps the engine; here an event loop speaks HTTP, and threads read requests.

`options` and `loading` come before the model and need no torch; `run` serves it. Needs the extra `serve`.
"""
