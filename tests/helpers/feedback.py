"""A pair to rate and a visitor of the rating page, for the tests of feedback."""

HERE = "http://127.0.0.1:8000"


def pair(store, prompt="It was", **options):
    return store.add(prompt, [" good.", " bad."], kind="compare", **options)


def visit(store, rater="ann", **options):
    """Return a client that the server takes for a browser on its own page."""
    from starlette.testclient import TestClient

    from textenv.feedback import web

    client = TestClient(web.make_app(store, **options), base_url=HERE, follow_redirects=False)
    client.headers.update({"origin": HERE, "sec-fetch-site": "same-origin"})
    if rater:
        assert client.post("/api/rater", json={"rater": rater}).status_code == 200
    return client
