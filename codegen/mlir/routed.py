"""x"""
class Routed:
    def __init__(self, lowering): pass
