"""An HTTP server over one engine, with the routes of OpenAI's API (`kelix serve`).

Needs the optional packages of `pip install -e '.[serve]'`.
"""
