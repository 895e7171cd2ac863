"""`python -m lumina_ds` is the same program as the `lumina` console script."""

from lumina_ds.cli.main import main

if __name__ == "__main__":
    main()
