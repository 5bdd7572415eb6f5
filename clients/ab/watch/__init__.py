"""The daily watch over what is served: has something drifted from the build, or from the days before?"""
