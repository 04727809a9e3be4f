"""`python -m dtr_deploy` is `dtr-deploy`."""

from dtr_deploy.cli import main

if __name__ == "__main__":
    main()
