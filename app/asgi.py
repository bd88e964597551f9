"""The application as an object, for servers that take one: `fastapi run app/asgi.py`, `gunicorn app.asgi:app`.

Settings come from the environment, but for the address: that is the server's.
"""

from app.main import create_app

app = create_app()
