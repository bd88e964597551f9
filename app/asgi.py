"""The application as an object, for servers that take one, such as `gunicorn app.asgi:app`; the address is theirs."""

from app.main import create_app

app = create_app()
