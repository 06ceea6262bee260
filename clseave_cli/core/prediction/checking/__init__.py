"""`check`: does each text of a page, folder or table fit its picture?"""
