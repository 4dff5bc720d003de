from qformat.cli import main

main()
