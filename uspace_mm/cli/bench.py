class Command:
    name="bench"; help="x"
    def prepare_parser(self,p): pass
    def run(self,a): return 0
