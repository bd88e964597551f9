"""`GET /`: what this is, for someone who opened it in a browser."""

from importlib.metadata import version
from string import Template

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from app.dependencies import SettingsDep

router = APIRouter(include_in_schema=False)

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pvt-serve</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px/1.6 system-ui, sans-serif; max-width: 42rem; margin: 4rem auto; padding: 0 1rem; color: #1d2733; }
  code, pre { background: #f1f4f8; border-radius: 6px; padding: .15em .4em; }
  pre { padding: 1rem; overflow-x: auto; }
  a { color: #0b5cad; }
</style>
<h1>pvt-serve</h1>
<p>This service classifies images with Pyramid Vision Transformer v2 models. Its default model is
<code>$model</code>.</p>
<pre>curl -F image=@image.png $url/predict</pre>
<ul>
  <li><a href="docs">Every endpoint, to try out</a></li>
  <li><a href="models">The models of the store</a></li>
  <li><a href="health">Health</a> and <a href="metrics">metrics</a></li>
</ul>
<p>Version $version</p>
</html>
""")


@router.get("/", response_class=HTMLResponse)
async def index(settings: SettingsDep) -> str:
    """A short page that says what this is."""
    url = f"http://localhost:{settings.port}"
    return _PAGE.substitute(model=settings.default_model, url=url, version=version("pvt-serve"))
