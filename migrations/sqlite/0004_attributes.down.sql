DROP VIEW agent_attributes;
CREATE TABLE agent_attributes (
    agent_id blob NOT NULL REFERENCES agents (id),
    key text NOT NULL,
    value text NOT NULL,
    PRIMARY KEY (agent_id, key)
);
INSERT INTO agent_attributes (agent_id, key, value)
SELECT s.agent_id, replace(replace(substr(p.value, 1, instr(p.value, '=') - 1), '%3D', '='), '%25', '%'),
       substr(p.value, instr(p.value, '=') + 1)
FROM agent_attribute_sets s, json_each(s.pairs) p;
CREATE INDEX agent_attributes_value ON agent_attributes (key, value, agent_id);
DROP TABLE agent_attribute_index;
DROP TABLE agent_attribute_sets;
DELETE FROM schema_versions WHERE version = 4;
