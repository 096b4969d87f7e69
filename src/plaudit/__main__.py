"""`python -m plaudit`: the command line, in the form that torchrun starts (`torchrun … -m plaudit reward …`)."""

from plaudit.cli.app import main

if __name__ == "__main__":
    main()
