"""An OpenAI-compatible server: one thread steps the engine, an event loop speaks HTTP, worker threads read requests.

`options` and `loading` come before the model and need no torch; `run` serves it. Needs the extra `serve`.
"""
