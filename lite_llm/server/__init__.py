"""An OpenAI-compatible server: one thread steps the engine, an event loop speaks HTTP, worker threads read requests.

Nothing heavy is imported here; `lite_llm.server.run` is the way in. Needs the extra `serve`.
"""
