"""The service: an engine's requests over HTTP, for clients that exist already and for a page in the browser.

It stands beside the face, on top of the engine. Every picture is painted by a `RequestQueue`, which also keeps the
line, deadlines and cancelling; here is what lies between that and the wire. Importing it needs the extra `serve`.
"""
