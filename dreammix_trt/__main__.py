"""`python -m dreammix_trt` is `dreammix-trt`."""

from dreammix_trt.cli import main

if __name__ == "__main__":
    main()
