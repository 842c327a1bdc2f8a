"""The suites of `regmix-fast bench`: `registry` lists them."""
